"""AMED: learned solvers for few model calls (Zhou et al., CVPR 2024, arXiv 2312.00094).

Between two time points a small network, the predictor, chooses for each sample where the one model call in between is
made, and how far its direction is followed. `students` has the formulas, `predictor` the network and its file,
`schedules` the time points, `sampling` the sampler, `training` the distillation from a solver of more steps.
`python -m samplers.amed`, in the folder of the pack, trains from a shell.
"""
