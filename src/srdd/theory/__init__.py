"""The diffusion view of scale-wise models made executable: the bound, signal-to-noise ratios, likelihoods."""
