"""`ray job submit … -- python jobs/pack.py SRC DEST`.

Takes what `bsq-ray data pack` takes, and packs on the cluster the job runs on.
"""

import sys

from bsq_ray.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["data", "pack"]
    main()
