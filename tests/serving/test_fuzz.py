"""The contract against a service with a real bundle and store: whatever is sent, the answer is one that the contract names."""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")

from loopfm_ray.serving.api import create_api  # noqa: E402
from loopfm_ray.serving.predictor import load_predictor  # noqa: E402
from loopfm_ray.serving.rollout import Rollout, Rollouts, Served  # noqa: E402
from loopfm_ray.serving.service import Service  # noqa: E402

MAX_EXAMPLES = int(os.environ.get("LOOPFM_FUZZ_EXAMPLES", "30"))
"""Cases of each operation and kind; `make fuzz` takes more."""
OPERATIONS = (
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{vm}"),
    ("POST", "/v1/models/{vm}:score"),
    ("POST", "/v1/models/{vm}:batch"),
)
CASES: Counter[str] = Counter()
"""Requests that were sent, by operation."""
ACCEPTANCE = schemathesis.checks.positive_data_acceptance
MODES = tuple(schemathesis.GenerationMode)
"""Requests that fit the contract, and requests that do not."""


@pytest.fixture(scope="module")
def api(world):
    service = Service(lambda served: load_predictor(served.bundle, served.online))
    served = Served(bundle=str(world.bundle), online=str(world.online))
    assert not service.apply(Rollouts(models={"vm": Rollout(stable=served)}))
    yield schemathesis.openapi.from_asgi("/openapi.json", create_api(service))
    service.close()


def test_every_operation_is_tried(api):
    found = {(o.ok().method.upper(), o.ok().path) for o in api.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_breaks_the_service(api, method, path, mode):
    operation = api[path][method]
    if mode is schemathesis.GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("nothing can be wrong in a request without a body: every name is a string")

    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(operation.as_strategy(generation_mode=mode))
    def run(case):
        if "vm" in case.path_parameters and len(str(case.path_parameters["vm"])) % 2:
            case.path_parameters["vm"] = "vm"  # else nearly all would end at 404
        CASES[operation.label] += 1
        response = case.call()
        assert response.status_code < 500, (response.status_code, response.text[:500])
        # what fits the contract may still not fit the model, which alone knows its fields
        is_refused = response.status_code == 422 and mode is schemathesis.GenerationMode.POSITIVE
        if is_refused and response.json()["errors"]:
            fields = {entry["field"].split(".")[-1] for entry in response.json()["errors"]}
            # generated times may lie before 1970
            assert fields <= {"request_ts"} or "context" in response.text, response.text[:500]
        case.validate_response(response, excluded_checks=[ACCEPTANCE] if is_refused else [])

    run()


def test_so_many_requests_were_sent(capsys):
    """Runs last: of the operations without parameters there are few that differ."""
    with capsys.disabled():
        print(f" {CASES.total()} requests: {dict(CASES)}")  # noqa: T201
    assert CASES.total() > 5 * MAX_EXAMPLES
