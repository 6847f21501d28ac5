#![no_main]

qcqa_fuzz::target!(index);
