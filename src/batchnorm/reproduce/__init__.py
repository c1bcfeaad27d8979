"""The paper claim by claim, one room each."""
