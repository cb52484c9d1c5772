"""What a pre-trained model is worth: fine-tuning and probes on labelled data of a site or of a published set."""
