"""Run one sweep file, from anywhere: `python sweeps/run.py sweeps/fm_scale.yaml`, or as a job: `ray job submit ... -- python sweeps/run.py ...`.

The same as `loopfm sweep`, for clusters on which the command is not on the path.
"""

import sys

from loopfm_ray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "sweep")
    main()
