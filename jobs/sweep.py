"""`ray job submit … -- python jobs/sweep.py --config FILE --data URL --held-out URL --out URL --resume`.

Takes what `bsq-ray sweep` takes, and runs the trials on the cluster the job runs on. `ray job stop` leaves a sweep that
the same submission goes on with; `--resume` begins where there is nothing yet.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["sweep"]
    main()
