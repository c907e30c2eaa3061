import subprocess
import sys

CODE = """
import resource
import torch
from loopfm_ray.train.process import set_up_process

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(8 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

set_up_process()
faults()
print(torch.get_num_threads(), faults())
"""


def test_memory_of_large_tensors_is_kept_for_the_next_ones():
    run = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120
    )
    threads, faults = map(int, run.stdout.split())
    assert threads == 1
    assert sys.platform != "linux" or faults < 2048  # the pages of one such tensor, not of 20
