"""The contrastive losses, each dense and as a ring over the mesh."""
