"""Pictures in and out: resolution buckets, SigLIP2 tower and aligner, the 3-D VAE (spec sections 7 to 10)."""
