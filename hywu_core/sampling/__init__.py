"""Step 3 of an edit: noise becomes the edited picture's latent under the injected LoRA."""
