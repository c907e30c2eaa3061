"""What one file under infra/ takes for granted, another one gives: ports, names, paths, secrets."""

import re
import subprocess
import sys

import boto3
import pytest
import yaml

from infra.submit import DEFAULT_ADDRESS
from loopfm_ray.jobs.security import examine_security
from loopfm_ray.serving.config import ServeConfig
from tests.infra.deployments import (
    INFRA,
    KUBERNETES,
    LAUNCHERS,
    RAY_KINDS,
    ROOT,
    commands,
    compose,
    compose_variables,
    containers,
    load,
    manifests,
    of_kind,
    one,
    pod_templates,
    ray_cluster_spec,
    words_of,
)
from tests.infra.test_commands import trained_config

SECRETS = {"loopfm-ray-token", "loopfm-s3", "loopfm-api-keys", "loopfm-prometheus-key"}
DASHBOARD, SERVE, AGENT, PROMETHEUS = 8265, 8000, 52365, 9090


def deployment():
    return yaml.safe_load(one("RayService")["spec"]["serveConfigV2"])


def serve_args():
    (application,) = deployment()["applications"]
    return ServeConfig.model_validate(application["args"])


def container(kind, name):
    (found,) = [one for one in containers() if one.kind == kind and one.spec["name"] == name]
    return found


def ports(spec):
    return {port["name"]: port["containerPort"] for port in spec.get("ports", [])}


# who is who


def test_ray_containers_have_the_token_from_the_secret_and_say_so():
    found = [one for one in containers() if one.is_ray or one.spec["name"] == "submit"]
    assert len(found) == 8
    for one_ in found:
        environ = {entry["name"]: entry for entry in one_.spec["env"]}
        assert environ["RAY_AUTH_MODE"]["value"] == "token"
        reference = environ["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert reference == {"name": "loopfm-ray-token", "key": "auth_token"}
    for tree in manifests():
        if tree["kind"] in RAY_KINDS:
            options = ray_cluster_spec(tree)["authOptions"]
            assert options == {"mode": "token", "secretName": "loopfm-ray-token"}


def test_everything_of_ray_elsewhere_has_a_token_too():
    for name, service in compose()["services"].items():
        if "loopfm-ray" in service["image"]:
            assert service["environment"]["RAY_AUTH_MODE"] == "token", name
            assert service["environment"]["RAY_AUTH_TOKEN"] == "RAY_AUTH_TOKEN-value", name
    for path in LAUNCHERS:
        tree = load(path)
        assert "--env RAY_AUTH_MODE=token" in tree["docker"]["run_options"]
        assert tree["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def test_secrets_are_made_by_the_commands_of_the_docs_and_hold_what_is_read():
    used = set()
    for one_ in containers():
        used |= {
            entry["valueFrom"]["secretKeyRef"]["name"]
            for entry in one_.spec.get("env", [])
            if "valueFrom" in entry
        }
        used |= {entry["secretRef"]["name"] for entry in one_.spec.get("envFrom", [])}
        used |= {
            volume["secret"]["secretName"]
            for volume in one_.pod["spec"].get("volumes", [])
            if "secret" in volume
        }
    assert used == SECRETS
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    made = dict(re.findall(r"create secret generic (\S+) --from-(?:env-)?file=(\S+)", text))
    assert set(made) == SECRETS
    assert made["loopfm-ray-token"].startswith("auth_token=")
    scraped = yaml.safe_load(one("ConfigMap")["data"]["prometheus.yml"])["scrape_configs"][0]
    assert scraped["authorization"]["credentials_file"].endswith(made["loopfm-prometheus-key"])
    assert serve_args().api_keys.endswith(made["loopfm-api-keys"])


def test_no_file_holds_a_secret():
    assert not of_kind("Secret")
    example = (INFRA / ".env.example").read_text(encoding="utf-8").splitlines()
    values = dict(line.split("=", 1) for line in example if line and not line.startswith("#"))
    assert compose_variables() <= set(values)
    for name, value in values.items():
        is_secret = re.search("TOKEN|KEY|PASSWORD", name)
        assert not is_secret or value == "", name
    assert ".env" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


# rights


def test_pods_run_as_a_user_without_rights():
    for kind, template in pod_templates():
        context = template["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True, kind
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for one_ in containers():
        assert one_.spec["securityContext"]["allowPrivilegeEscalation"] is False
        assert one_.spec["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        if "loopfm-ray" in one_.spec["image"]:
            assert one_.pod["spec"]["securityContext"]["runAsUser"] == 1000


def test_containers_say_what_they_need_and_what_they_may_take():
    for one_ in containers():
        resources = one_.spec["resources"]
        assert set(resources["requests"]) >= {"cpu", "memory"}, one_.spec["name"]
        assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_object_stores_fit_their_shared_memory():
    sizes = {"1Gi": 2**30, "2Gi": 2**31}
    for tree in manifests():
        if tree["kind"] not in RAY_KINDS:
            continue
        spec = ray_cluster_spec(tree)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            (shm,) = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
            assert shm["emptyDir"]["medium"] == "Memory"
            wanted = int(group["rayStartParams"]["object-store-memory"])
            assert wanted < sizes[shm["emptyDir"]["sizeLimit"]]


def test_workers_come_and_go_and_heads_take_no_tasks():
    for tree in manifests():
        if tree["kind"] in RAY_KINDS:
            spec = ray_cluster_spec(tree)
            assert spec["enableInTreeAutoscaling"] is True
            assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
            for group in spec["workerGroupSpecs"]:
                assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]


# probes and ports


@pytest.mark.parametrize("kind", RAY_KINDS)
def test_probes_ask_what_answers(kind):
    """The paths are those that Ray answers without a token; tests/ray/test_deploy.py asks a head for them."""
    alive = {
        "ray-head": ("/api/gcs_healthz", DASHBOARD),
        "ray-worker": ("/api/local_raylet_healthz", AGENT),
    }
    found = [one_ for one_ in containers() if one_.kind == kind and one_.is_ray]
    assert found
    for one_ in found:
        named = ports(one_.spec)
        for probe in ("livenessProbe", "readinessProbe"):
            get = one_.spec[probe]["httpGet"]
            is_proxy = (kind, one_.spec["name"], probe) == (
                "RayService", "ray-worker", "readinessProbe",
            )  # fmt: skip
            wanted = ("/-/healthz", SERVE) if is_proxy else alive[one_.spec["name"]]
            assert (get["path"], named[get["port"]]) == wanted


def test_compose_asks_for_health_where_something_answers():
    asked = {
        name: service["healthcheck"]["test"][-1]
        for name, service in compose()["services"].items()
        if "healthcheck" in service
    }
    assert asked == {
        "head": f"http://127.0.0.1:{DASHBOARD}/api/gcs_healthz",
        "worker": f"http://127.0.0.1:{AGENT}/api/local_raylet_healthz",
        "serve": f"http://127.0.0.1:{SERVE}/readyz",
    }
    for service in compose()["services"].values():
        if "healthcheck" in service:
            assert service["healthcheck"]["test"][1] == "wget"  # that the Dockerfile installs
    dockerfile = (INFRA / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"apt-get install .*\brsync wget\b", dockerfile)


def test_what_is_published_by_compose_is_on_loopback_alone():
    published = {
        name: service["ports"] for name, service in compose()["services"].items() if "ports" in service
    }  # fmt: skip
    assert published == {
        "head": [f"127.0.0.1:{DASHBOARD}:{DASHBOARD}"],
        "serve": [f"127.0.0.1:{SERVE}:{SERVE}", f"127.0.0.1:{PROMETHEUS}:{PROMETHEUS}"],
        "grafana": ["127.0.0.1:3000:3000"],
    }
    settings = ServeConfig.model_validate({"bundle": "b", **load(INFRA / "compose/serve.yaml")})
    assert settings.port == SERVE
    assert settings.trusted_network


def test_head_dashboard_and_submission_have_one_port():
    starts = [words for _, words in commands() if words[:3] == ["ray", "start", "--head"]]
    assert len(starts) == 1 + len(LAUNCHERS)
    for words in starts:
        assert f"--dashboard-port={DASHBOARD}" in words
        assert "--port=6379" in words
    assert f"http://127.0.0.1:{DASHBOARD}" == DEFAULT_ADDRESS
    for _, words in commands():
        if words[:3] == ["ray", "job", "submit"]:
            assert words[3].endswith(f":{DASHBOARD}")


def test_workers_join_a_head_that_is_there():
    services = compose()["services"]
    assert "--address=head:6379" in words_of(services["worker"]["command"])
    assert "--address=http://head:8265" in words_of(services["train"]["command"])
    for path in LAUNCHERS:
        (_, start) = load(path)["worker_start_ray_commands"]
        assert "--address=$RAY_HEAD_IP:6379" in start
    submitted = container("CronJob", "submit").spec["command"][3]
    cluster = one("RayCluster")["metadata"]["name"]
    assert submitted == f"--address=http://{cluster}-head-svc:{DASHBOARD}"


def test_the_dashboard_of_machines_is_on_loopback():
    for path in LAUNCHERS:
        assert "--dashboard-host=127.0.0.1" in load(path)["head_start_ray_commands"][1]


# network policies


def policies():
    return {tree["metadata"]["name"]: tree["spec"] for tree in of_kind("NetworkPolicy")}


def test_nothing_comes_in_or_goes_out_but_what_is_named():
    everything = policies()["nothing-in-or-out"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("name", ["among-ourselves", "callers-to-serving", "monitoring-to-serving"])
def test_a_policy_chooses_pods_that_there_are(name):
    wanted = policies()[name]["podSelector"]["matchLabels"].items()
    labels = [template["metadata"]["labels"].items() for _, template in pod_templates()]
    assert any(wanted <= one_ for one_ in labels)


def test_every_pod_is_one_of_ours():
    for kind, template in pod_templates():
        assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "loopfm", kind


def test_policies_open_ports_that_something_listens_on():
    opened = {
        (name, port["port"])
        for name, spec in policies().items()
        for rule in spec.get("ingress", [])
        for port in rule.get("ports", [])
    }
    assert opened == {
        ("operator-to-ray", DASHBOARD),
        ("operator-to-ray", SERVE),
        ("callers-to-serving", SERVE),
        ("monitoring-to-serving", PROMETHEUS),
    }
    assert ports(container("RayService", "prometheus").spec)["prometheus"] == PROMETHEUS


# the scoring service


def test_the_service_asks_for_keys_and_listens_where_it_is_probed():
    http = deployment()["http_options"]
    assert (http["host"], http["port"]) == ("0.0.0.0", SERVE)
    assert ports(container("RayService", "ray-worker").spec)["serve"] == SERVE
    serve_args().check_doors(http["host"])
    assert serve_args().api_keys is not None


def test_files_for_serving_have_no_faults_but_those_of_files_that_are_elsewhere(tmp_path):
    path = tmp_path / "deployment.yaml"
    path.write_text(one("RayService")["spec"]["serveConfigV2"], encoding="utf-8")
    found = examine_security([path, INFRA / "compose/serve.yaml"], tmp_path, tmp_path, {})
    faults = [finding for finding in found if not finding.is_ok]
    assert [finding.name for finding in faults] == [serve_args().api_keys]


def test_it_serves_what_training_leaves():
    config, args = trained_config(), serve_args()
    assert args.bundle == str(config.paths.bundle)
    assert args.online == config.online_target
    service = [tree for tree in of_kind("Service") if tree["metadata"]["name"] == "loopfm-redis"]
    assert args.online.startswith(
        f"redis://{service[0]['metadata']['name']}:{service[0]['spec']['ports'][0]['port']}/"
    )


def test_its_key_file_is_copied_where_it_looks_for_it():
    init = container("RayService", "keys").spec
    assert init["command"][:3] == ["install", "-m", "600"]
    source, target = init["command"][3:]
    assert target == serve_args().api_keys
    mounts = {one_["mountPath"]: one_["name"] for one_ in init["volumeMounts"]}
    assert mounts[source.rsplit("/", 1)[0]] == "key-secret"
    worker = container("RayService", "ray-worker").spec
    held = {one_["mountPath"]: one_["name"] for one_ in worker["volumeMounts"]}
    assert held[target.rsplit("/", 1)[0]] == mounts[target.rsplit("/", 1)[0]]


def test_its_cache_fits():
    worker = container("RayService", "ray-worker")
    (cache,) = [v for v in worker.pod["spec"]["volumes"] if v["name"] == "cache"]
    assert (
        serve_args().cache_bytes * 2
        <= int(cache["emptyDir"]["sizeLimit"].removesuffix("Gi")) * 2**30
    )


def test_a_replica_for_each_cpu_at_most():
    spec = ray_cluster_spec(one("RayService"))
    (group,) = spec["workerGroupSpecs"]
    cpus = int(container("RayService", "ray-worker").spec["resources"]["limits"]["cpu"])
    autoscale = serve_args().autoscale
    assert autoscale.max_replicas * serve_args().num_cpus <= cpus * group["maxReplicas"]
    assert autoscale.min_replicas * serve_args().num_cpus <= cpus * group["minReplicas"]


def test_volumes_that_are_mounted_are_there():
    for one_ in containers():
        volumes = {volume["name"] for volume in one_.pod["spec"].get("volumes", [])}
        volumes |= {"data"} if one_.kind == "StatefulSet" else set()
        mounted = {mount["name"] for mount in one_.spec.get("volumeMounts", [])}
        assert mounted <= volumes, one_.spec["name"]
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for _, template in pod_templates()
        for volume in template["spec"].get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert claims == {one("PersistentVolumeClaim")["metadata"]["name"]}


# watching


def scrape(tree):
    (job,) = tree["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    return job["job_name"], discovery["files"]


def test_prometheus_finds_replicas_where_they_write_their_addresses():
    """The same folder in the serve config, in the container and in Prometheus; both must be able to see it."""
    name, files = scrape(load(INFRA / "prometheus.yml"))
    assert scrape(yaml.safe_load(one("ConfigMap")["data"]["prometheus.yml"])) == (name, files)
    folder = files[0].rsplit("/", 1)[0]
    settings = load(INFRA / "compose/serve.yaml")
    assert serve_args().metrics.targets == settings["metrics"]["targets"] == folder
    services = compose()["services"]
    for service in ("serve", "prometheus"):
        assert any(v.startswith(f"targets:{folder}") for v in services[service]["volumes"])
    assert services["prometheus"]["network_mode"] == "service:serve"
    for part in ("ray-worker", "prometheus"):
        mounts = container("RayService", part).spec["volumeMounts"]
        assert {"targets": folder}.items() <= {m["name"]: m["mountPath"] for m in mounts}.items()
    rules = (INFRA / "rules/loopfm.yml").read_text(encoding="utf-8")
    assert f'job="{name}"' in rules


def test_prometheus_listens_where_grafana_and_the_policy_look():
    services = compose()["services"]
    listen = f"--web.listen-address=0.0.0.0:{PROMETHEUS}"
    assert listen in services["prometheus"]["command"]
    assert listen in container("RayService", "prometheus").spec["args"]
    (source,) = load(INFRA / "compose/grafana-datasource.yaml")["datasources"]
    assert source["url"] == f"http://serve:{PROMETHEUS}"
    images = {services["prometheus"]["image"], container("RayService", "prometheus").spec["image"]}
    assert len(images) == 1


def test_what_compose_mounts_is_there():
    for service in compose()["services"].values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (INFRA / source).exists(), source
            else:
                assert source in compose()["volumes"], source


def test_the_bucket_is_the_one_that_runs_are_kept_in():
    services = compose()["services"]
    program = services["bucket"]["command"][2]
    compile(program, "bucket", "exec")
    (store,) = [word for word in services["train"]["command"] if word.startswith("store=s3://")]
    bucket = store.removeprefix("store=s3://").split("/")[0]
    assert f'create_bucket(Bucket="{bucket}")' in program
    endpoint = services["head"]["environment"]["AWS_ENDPOINT_URL"]
    assert f"-s3.port={endpoint.rsplit(':', 1)[1]}" in services["object-store"]["command"]


@pytest.mark.s3
@pytest.mark.usefixtures("s3")
def test_the_bucket_is_made_once():
    program = compose()["services"]["bucket"]["command"][2].replace("loopfm", "other-bucket")
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program], check=True, timeout=90)
    found = boto3.client("s3", region_name="us-east-1").list_buckets()["Buckets"]
    assert "other-bucket" in [bucket["Name"] for bucket in found]


def test_regions_of_the_aws_file_agree():
    tree = load(INFRA / "ray/aws.yaml")
    assert f"--env AWS_REGION={tree['provider']['region']}" in tree["docker"]["run_options"]


def test_files_that_the_docs_apply_are_there():
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    applied = set(re.findall(r"infra/kubernetes/(\w+\.yaml)", text))
    assert applied == {path.name for path in KUBERNETES.glob("*.yaml")}
