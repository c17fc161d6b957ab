"""What the Triton operators share: device functions, launching, allocating, checks of arguments. Nothing about one operator."""
