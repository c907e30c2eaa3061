"""Write the Python code of `scoring.proto` beside it; needs grpcio-tools, which `loopfm-ray[dev]` has.

Run `python -m loopfm_ray.serving.generate` after a change of the contract.
"""

import subprocess
import sys
from pathlib import Path

__all__ = ["GENERATED", "generate"]

GENERATED = ("scoring_pb2.py", "scoring_pb2.pyi", "scoring_pb2_grpc.py")
_ROOT = Path(__file__).parents[2]
_PROTO = "loopfm_ray/serving/scoring.proto"


def generate(out: Path, root: Path = _ROOT) -> None:
    """Write `loopfm_ray/serving/scoring_pb2*` below `out`.

    Args:
        out: the project's root, or a folder to compare with it.
        root: where `loopfm_ray/serving/scoring.proto` lies below; imports are named from here.

    Raises:
        CalledProcessError: the compiler refuses the file, or is not installed; it says which.
    """
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{root}"]
    command += [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, _PROTO], check=True, cwd=root)


if __name__ == "__main__":
    generate(_ROOT)
