"""``python -m ds_llep COMMAND``, which is ``ds-llep COMMAND``."""

import sys

from ds_llep.cli import main

if __name__ == "__main__":
    sys.exit(main())
