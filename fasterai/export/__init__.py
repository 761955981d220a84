"""Export of models to files for other programs; each file is compared with the model before it is put in place."""
