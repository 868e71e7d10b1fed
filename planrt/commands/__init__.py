"""Commands of ``planrt`` for whoever runs workers: their users, and the certificates of a federation."""
