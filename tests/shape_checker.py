"""The checker behind jaxtyping's annotations: beartype, with 1 accepted for 1.0."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
