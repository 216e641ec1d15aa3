# Of the recipes on LibriSpeech and DEMAND: TEMPLATE/db.sh, and what they have in common beside it.
# shellcheck shell=bash disable=SC2034  # who sources this uses what it sets
# shellcheck disable=SC1091
. ../../TEMPLATE/db.sh
DOWNLOADS=${DOWNLOADS:-../../librispeech/ssft1/downloads}
NOISE_SEEN=data/demand/seen  # made by local/data.sh
NOISE_UNSEEN=data/demand/unseen
