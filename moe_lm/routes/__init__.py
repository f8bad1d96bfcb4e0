"""What the router of a mixture does with a text: `python -m moe_lm.routes`, and the parts it is made of."""
