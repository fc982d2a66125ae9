//! MEM-1: a door consumes the handle that it samples, so that the same handle
//! is not sampled again, neither by a door nor by the kernel.

use stableio_mem::doors::{promise, stabilize, verify_in_place};
use stableio_mem::{Fault, ForeignBuf, Grant, Pass, PromisedBuf, Reservation, SgList};

fn stabilize_twice(foreign: ForeignBuf, pass: Pass, memory: &mut Reservation) -> Result<(), Fault> {
    let (_copy, _) = stabilize(foreign, 0, pass, memory)?;
    let (_other, _) = stabilize(foreign, 0, pass, memory)?;
    Ok(())
}

fn promise_after_stabilize(
    foreign: ForeignBuf,
    pass: Pass,
    memory: &mut Reservation,
) -> Result<PromisedBuf, Fault> {
    let (_copy, _) = stabilize(foreign, 0, pass, memory)?;
    Ok(promise(foreign, Grant::by_administrator()))
}

fn stabilize_after_promise(
    foreign: ForeignBuf,
    pass: Pass,
    memory: &mut Reservation,
) -> Result<PromisedBuf, Fault> {
    let promised = promise(foreign, Grant::by_administrator());
    let (_copy, _) = stabilize(foreign, 0, pass, memory)?;
    Ok(promised)
}

fn write_after_stabilize(
    foreign: ForeignBuf,
    pass: Pass,
    memory: &mut Reservation,
) -> Result<SgList, Fault> {
    let (_copy, _) = stabilize(foreign, 0, pass, memory)?;
    Ok(SgList::from(foreign))
}

fn verify_after_stabilize(
    foreign: ForeignBuf,
    pass: Pass,
    memory: &mut Reservation,
) -> Result<bool, Fault> {
    let (_copy, sums) = stabilize(foreign, 0, pass, memory)?;
    Ok(verify_in_place(&foreign, 0, &sums.guards)?.is_good())
}

fn main() {}
