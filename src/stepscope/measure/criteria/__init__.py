"""The literature's criteria, and how well they find the tokens that carry influence."""
