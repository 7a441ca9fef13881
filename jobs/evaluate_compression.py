"""`ray job submit … -- python jobs/evaluate_compression.py --model M --data DIR --out URL --workers N`.

Accepts the options of `bsq-ray evaluate compression`. The evaluation runs on the cluster of the job.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main(["evaluate", "compression", *sys.argv[1:]])
