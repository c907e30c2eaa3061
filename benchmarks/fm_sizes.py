"""What the five FMs of `configs/fm` hold and compute for an example: parameters and operations, on fields as those of Complete Journey.

Nothing is trained or allocated. `README.md` beside this file says what each key means.
"""

import argparse
from pathlib import Path
from typing import Any

from machine import describe_machine, print_found

from loopfm_ray.config import load_config
from loopfm_ray.data.schema import FeatureSchema, Field, Kind, Side
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.models.costs import RequestShape, fm_cost

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ("s", "m", "l", "xl", "xxl")
USER = {"user": 2_426, "age": 7, "income": 13, "home_ownership": 5, "marital_status": 3}
USER |= {"household_size": 6, "household_comp": 5, "kids_count": 5}
ITEM = {"item": 55_459, "department": 31, "brand": 3, "category": 300, "type": 2_125}
ITEM |= {"maker": 4_512, "size": 2_705}
CONTEXT = {"store": 384, "hour": 25, "weekday": 8}
NUM_NUMERIC = 10


def schema() -> FeatureSchema:
    """Return fields of the kinds and sizes of Complete Journey's before its 27th week."""
    sides = ((USER, Side.USER), (ITEM, Side.ITEM), (CONTEXT, Side.CONTEXT))
    fields = [
        Field(name, side, Kind.CATEGORICAL, size)
        for sizes, side in sides
        for name, size in sizes.items()
    ]
    fields += [Field(f"past_{index}", Side.PAST, Kind.NUMERIC) for index in range(NUM_NUMERIC)]
    return FeatureSchema(tuple(fields), ("label",))


def main() -> None:
    """Measure as the command line says and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--history-len", type=int, default=100, help="events of a history")
    args = parser.parse_args()
    shape = RequestShape(num_candidates=1, history_len=args.history_len)
    found: dict[str, Any] = {"history_len": args.history_len}
    for name in NAMES:
        settings = [f"fm={CONFIGS / 'fm' / name}.yaml"]
        config = load_config(
            PipelineConfig, CONFIGS / "pipeline" / "complete_journey.yaml", settings
        )
        cost = fm_cost(config.fm.model, schema(), tuple(ITEM), shape)
        found[f"{name}_dense_parameters"] = cost.num_dense_parameters
        found[f"{name}_table_parameters"] = cost.num_table_parameters
        found[f"{name}_flops_per_row"] = cost.flops_per_row
    print_found({**found, "machine": describe_machine(["torch"])}, args.json)


if __name__ == "__main__":
    main()
