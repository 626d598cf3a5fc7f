"""The project's commands on a Slurm cluster, through submitit; installed as ``dino_depth.slurm``."""
