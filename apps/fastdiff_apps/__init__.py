"""Applications on top of fastdiff; the Gradio demo will live here."""
