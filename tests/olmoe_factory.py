"""What builds the tests' tiny model, for ``--config olmoe_factory:build_tied``."""

from tiny import Case

build_tied = Case(tied=True).build_model
build_untied = Case(tied=False).build_model
