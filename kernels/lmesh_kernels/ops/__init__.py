"""One operation a file: public function, plain-torch reference, and later the kernels behind it."""
