//! How the image is linked: no start files, its constructor before every other, nothing resolved lazily. A dozen
//! addresses of its own are relocated; a part of the image that is made read-only afterwards would be a page of memory in
//! every process for them.

fn main() {
    for argument in ["-nostartfiles", "-Wl,-z,initfirst,-z,now,-z,norelro,-Bsymbolic"] {
        println!("cargo::rustc-cdylib-link-arg={argument}");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
