#[test] fn a() { }
