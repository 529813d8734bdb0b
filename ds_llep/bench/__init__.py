"""What the commands of `ds-llep` are made of; `plan` and `memory` run as modules (`python -m`)."""
