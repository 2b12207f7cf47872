"""How torch is made to compute what is meant: precision and differentiation."""
