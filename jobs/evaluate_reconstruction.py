"""`ray job submit … -- python jobs/evaluate_reconstruction.py --model M --data URL --out URL --workers N`.

Accepts the options of `bsq-ray evaluate reconstruction`. The evaluation runs on the cluster of the job.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main(["evaluate", "reconstruction", *sys.argv[1:]])
