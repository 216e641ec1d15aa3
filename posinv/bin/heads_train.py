"""Train all heads on one frozen front end at once; the front end runs once for each batch.

    heads_train --frontend ssl ... --head DIR --config pr.yaml ... --head DIR --config asr.yaml ...

The options are those of asr_train. Before the first --head, and after --all, stand those of all
heads; after --head DIR those of the head that is trained in DIR. DIR becomes what asr_train would
have made of it with all these options and --output_dir DIR, --seed included. Front end, audio and
batches must be the same for all heads; their order follows the --seed of all heads.

Two options are for all heads:
  --sweep_updates N  at the first validation after N updates, of the heads with the same parent
                     directory and random seed only the best on the validation set goes on
  --cache_dir DIR    keep the front end's layers in files in DIR, in float16, for later epochs and
                     trainings; in place of frontend_conf's cache_gb
"""

import sys

from posinv.bin.cli import run
from posinv.espnet.heads import HeadsTask, parse_arguments


def main() -> None:
    """Train."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        HeadsTask.main(cmd=["--help"])
    HeadsTask.main(args=parse_arguments(arguments))


if __name__ == "__main__":
    run(main)
