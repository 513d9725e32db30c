"""Writers of encoded samples, one module for each output format, found by ``--exporter NAME``."""
