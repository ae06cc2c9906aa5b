"""One module for each kin of model families: their configurations and processors, built small."""
