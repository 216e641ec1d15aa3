# Where the corpora are. Point these at your own copies; a relative path starts at the recipe.
# shellcheck shell=bash disable=SC2034
FSDD=../../../../shared/data/fsdd
# CMU AN4, with etc/ and wav/; where there is no such folder, the corpus is downloaded (64 MB), from
# NVIDIA's copy, as in NeMo; http://www.speech.cs.cmu.edu/databases/an4/ is its own page.
AN4=../../../../shared/data/an4_sample/an4
AN4_URL=https://dldata-public.s3.us-east-2.amazonaws.com/an4_sphere.tar.gz
AN4_CHECKSUM=sha256:a0525579493735d32b60fb6fa5975dd0eaacde087b0a4eeb7f13b7ef33077b12
# Of egs/librispeech*; empty: downloaded. LibriSpeech: the folder with train-clean-100; its lexicons;
# DEMAND: the folder with DKITCHEN; master64: the released DEMUCS; QUESST 2014, for --quesst14 true:
# the folder quesst14Database.
LIBRISPEECH=
LIBRISPEECH_LEXICON=()
DEMAND=
MASTER64=
QUESST14=
# Where from, or from which mirror; the checksums are in local/checksums.txt.
LIBRISPEECH_URL=https://www.openslr.org/resources/12
LIBRISPEECH_LEXICON_URL=https://huggingface.co/datasets/s3prl/g2p/raw/main/lexicon
DEMAND_URL=https://zenodo.org/records/1227121/files
MASTER64_URL=https://dl.fbaipublicfiles.com/adiyoss/denoiser
QUESST14_URL=https://speech.fit.vutbr.cz/files
# Folders of recorded noise, for recipes that use --recorded_noise true or only; empty: none.
NOISE_SEEN=
NOISE_UNSEEN=../../../../shared/data/an4_sample/noise
