//! What a completion says of its transfer: the room and the caller's own number.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use kvt::ids::{Room, TransferId};

/// What is kept of one transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) room: Room,
    pub(crate) user_data: u64,
}

/// The transfers of one engine that have not been reported. Each belongs to a handle, so the caller bounds it, and the
/// engine's `transfers_max` bounds the live ones.
#[derive(Debug, Default)]
pub(crate) struct Records(Mutex<HashMap<TransferId, Record>>);

impl Records {
    fn lock(&self) -> MutexGuard<'_, HashMap<TransferId, Record>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a transfer and keeps its record. Held over the opening, so that a completion of it finds the record.
    pub(crate) fn open<T, E>(
        &self,
        record: Record,
        open: impl FnOnce() -> Result<T, E>,
        id: impl FnOnce(&T) -> TransferId,
    ) -> Result<T, E> {
        let mut records = self.lock();
        let opened = open()?;
        records.insert(id(&opened), record);
        Ok(opened)
    }

    /// Takes the record of a transfer that has ended; `None` if it was freed.
    pub(crate) fn take(&self, id: TransferId) -> Option<Record> {
        self.lock().remove(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::{Record, Records};
    use kvt::ids::{Room, TransferId};

    #[test]
    fn a_record_is_there_from_the_opening_until_it_is_taken() {
        let records = Records::default();
        let room = Room::new(3).expect("not zero");
        let record = Record { room, user_data: 9 };
        let id = records.open(record, || Ok::<_, ()>(TransferId(5)), |id| *id);
        assert_eq!(id, Ok(TransferId(5)));
        assert_eq!(
            records.open(record, || Err::<TransferId, _>(1), |id| *id),
            Err(1)
        );
        assert_eq!(records.take(TransferId(5)), Some(record));
        assert_eq!(records.take(TransferId(5)), None);
    }
}
