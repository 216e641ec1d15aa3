# Where the corpora are. Point these at your own copies; a relative path starts at the recipe.
# shellcheck shell=bash disable=SC2034
FSDD=../../../../shared/data/fsdd
# Folders of recorded noise, for recipes that use --recorded_noise true; empty: none.
NOISE_SEEN=
NOISE_UNSEEN=../../../../shared/data/an4_sample/noise
