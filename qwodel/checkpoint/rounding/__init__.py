"""How one weight becomes codes: methods, statistics, codes found beforehand."""
