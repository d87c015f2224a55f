"""Networks: I3D, attention head, conditional VAE, recognizer."""
