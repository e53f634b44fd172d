"""Text, images and frames in and out of the latent space."""
