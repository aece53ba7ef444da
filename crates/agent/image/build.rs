//! How the image is linked: no start files, its constructor before every other, nothing resolved lazily.

fn main() {
    for argument in ["-nostartfiles", "-Wl,-z,initfirst,-z,now,-z,relro,-Bsymbolic"] {
        println!("cargo::rustc-cdylib-link-arg={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
