"""Evidence: methods measured side by side on one model, and the page that shows them (``tokencache bench``, ``tokencache report``)."""
