"""Models in folders that hold the code to draw with, too."""

from srdd.publish.card_section import card_with_code
from srdd.publish.carried_code import CarriedCode, add_code


__all__ = ["CarriedCode", "add_code", "card_with_code"]
