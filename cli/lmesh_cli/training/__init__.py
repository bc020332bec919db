"""Training from the command line: job files, jobs, adapters, exports; the mesh's side is lmesh.training.v1."""
