"""`ray job submit … -- python jobs/sweep.py --config FILE --data URL --held-out URL --out URL --resume`.

Accepts the options of `bsq-ray sweep`. The trials run on the cluster of the job. After `ray job stop` the
same submission resumes; `--resume` starts a new sweep if the folder is empty.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
