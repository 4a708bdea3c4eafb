"""A regular package, which goes before the `tests` that torch-fidelity installs."""
