"""The networks: the Sana transformer and the deep-compression autoencoder."""
