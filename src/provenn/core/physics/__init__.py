"""Physics that several methods share: discretised equations and their fields."""
