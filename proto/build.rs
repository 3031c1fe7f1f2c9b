//! Generates the header types from `lockstep.proto` without needing `protoc` on the machine.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=lockstep.proto");
    let descriptors = protox::compile(["lockstep.proto"], ["."])?;
    prost_build::Config::new().compile_fds(descriptors)?;
    Ok(())
}
