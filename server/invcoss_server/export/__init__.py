"""What a model is for: its encoder in the forms that other tools load, with a card that says where it comes from."""
