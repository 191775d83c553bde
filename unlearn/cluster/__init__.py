"""Many runs, in Slurm or here."""
